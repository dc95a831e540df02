"""The companion of *Sampling the Intractable*: small, tested samplers and estimators in PyTorch.

Import what you need from its modules, for instance `from companion.models.rbm import RBM`.
"""

__version__ = "0.1.0"
