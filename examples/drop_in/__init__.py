"""What a user changes: each script here beside the same script without vqssl in `before/`.

From the root of the repository: `python -m examples.drop_in.byol`, or `python -m examples.drop_in.before.byol`. What a
script imports besides torch, MONAI and kornia is to be installed by whoever runs it.
"""
