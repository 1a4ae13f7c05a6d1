"""Self-supervised pre-training on chest X-rays, taken apart: which ingredient buys what."""
