"""Ten scripts with vqssl, each beside the same script without it in `before/`.

From the root of the repository: `python -m examples.drop_in.byol`, or `python -m examples.drop_in.before.byol`. Scripts
about other libraries need those libraries beside the packages of `python3 examples`.
"""
