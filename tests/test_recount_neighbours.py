"""The recount agrees with what was recorded, and notices what was not."""

import json

import pytest

from eval.knn import KnnConfig
from eval.knn import main as evaluate
from pipeline.errors import UserError
from scripts.bench.neighbours import RecountConfig, main
from tests.evaluation import write_dataset, write_run


def test_agrees_or_says_so(tmp_path):
    data = write_dataset(tmp_path / "data")
    run = write_run(tmp_path / "run", data)
    with pytest.raises(UserError, match=r"results\.jsonl is missing"):
        main(RecountConfig(run, data))
    evaluate(KnnConfig(checkpoint=run, resolution=16))  # whose features are of the same checkpoint and images
    (run / "results.jsonl").unlink()
    result = evaluate(KnnConfig(checkpoint=run))
    main(RecountConfig(run, data, json=tmp_path / "checks.json"))
    (found,) = json.loads((tmp_path / "checks.json").read_text())
    assert found["recorded"]["20"] == pytest.approx(result["value"]) and found["images"] == [200, 60]

    results = run / "results.jsonl"
    results.write_text(results.read_text().replace(f'"top1_k10": {result["values"]["top1_k10"]}', '"top1_k10": 99.0'))
    with pytest.raises(SystemExit):
        main(RecountConfig(run, data))
