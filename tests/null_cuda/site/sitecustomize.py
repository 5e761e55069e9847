"""Runs at the start of a Python program on the null CUDA runtime: torch without cuDNN, which has no null form."""

import importlib.machinery
import sys


class TorchWithoutCudnn:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def load_without(module):
            load(module)
            module.backends.cudnn.enabled = False
            module.backends.cuda.enable_cudnn_sdp(False)

        spec.loader.exec_module = load_without
        return spec


sys.meta_path.insert(0, TorchWithoutCudnn)
