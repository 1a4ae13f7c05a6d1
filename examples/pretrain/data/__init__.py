"""Square images with labels, patients and masks: how files become an :class:`ImageSet`, and how it is split."""

from examples.pretrain.data.imageset import ImageSet
from examples.pretrain.data.load import cache_of, load_images
from examples.pretrain.data.reading import Reading
from examples.pretrain.data.split import train_test_split

__all__ = ["ImageSet", "Reading", "cache_of", "load_images", "train_test_split"]
