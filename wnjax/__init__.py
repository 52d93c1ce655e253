"""Weight normalization for JAX and Flax: w = g·v/‖v‖."""

from wnjax import convert as convert
from wnjax import linen as linen
from wnjax import nnx as nnx
from wnjax import pytorch as pytorch
from wnjax._axes import Axes as Axes
from wnjax._axes import NotWeight as NotWeight
from wnjax._axes import Weight as Weight
from wnjax._data_init import data_init as data_init
from wnjax._data_initialized import DataInitializedState as DataInitializedState
from wnjax._data_initialized import data_initialized as data_initialized
from wnjax._infer_axes import infer_axes as infer_axes
from wnjax._inspect import labels as labels
from wnjax._inspect import norms as norms
from wnjax._inspect import summary as summary
from wnjax._keep_norms import keep_norms as keep_norms
from wnjax._nodes import LogWeightNorm as LogWeightNorm
from wnjax._nodes import WeightNorm as WeightNorm
from wnjax._nodes import is_weight_norm as is_weight_norm
from wnjax._optimizer import WeightNormalizedState as WeightNormalizedState
from wnjax._optimizer import inner_params as inner_params
from wnjax._optimizer import weight_normalized as weight_normalized
from wnjax._report import Initialized as Initialized
from wnjax._weight_norm import fold as fold
from wnjax._weight_norm import weight_norm as weight_norm
from wnjax._wrap import wrap as wrap

__version__ = "0.1.0"
