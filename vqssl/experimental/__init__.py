"""Experimental parts: names here may change or go with any release.

>>> import vqssl, vqssl.experimental
>>> codebook = vqssl.EMACodebook(codebook_size=8, dim=4)
>>> codebook.set_codes_(codebook.embed)
>>> vqssl.experimental.resized(codebook, 12).codebook_size
12
"""

from vqssl.experimental.resizing import resized

__all__ = ["resized"]
