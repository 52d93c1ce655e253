"""Weights that other libraries have normalized, and (g, v) leaves that a file has made dicts of.

Every function takes a whole tree, keeps all that is not weight-normalized as it is, and is pure.
"""

from wnjax.convert._dicts import from_dicts as from_dicts
from wnjax.convert._equinox import from_equinox as from_equinox
from wnjax.convert._linen import from_linen as from_linen
from wnjax.convert._nnx import from_nnx as from_nnx
from wnjax.convert._paramax import from_paramax as from_paramax
