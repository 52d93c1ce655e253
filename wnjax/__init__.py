"""Weight normalization for JAX and Flax: w = g·v/‖v‖."""

from wnjax import convert as convert
from wnjax import linen as linen
from wnjax import nnx as nnx
from wnjax import pytorch as pytorch
from wnjax._axes.decisions import Axes as Axes
from wnjax._axes.decisions import NotWeight as NotWeight
from wnjax._axes.decisions import Weight as Weight
from wnjax._leaves.gv import LogWeightNorm as LogWeightNorm
from wnjax._leaves.gv import WeightNorm as WeightNorm
from wnjax._leaves.gv import is_weight_norm as is_weight_norm
from wnjax._optimizers.data_initialized import DataInitializedState as DataInitializedState
from wnjax._optimizers.data_initialized import data_initialized as data_initialized
from wnjax._optimizers.keep_norms import keep_norms as keep_norms
from wnjax._optimizers.weight_normalized import WeightNormalizedState as WeightNormalizedState
from wnjax._optimizers.weight_normalized import inner_params as inner_params
from wnjax._optimizers.weight_normalized import weight_normalized as weight_normalized
from wnjax._transforms.data_init import data_init as data_init
from wnjax._transforms.infer_axes import infer_axes as infer_axes
from wnjax._transforms.inspect import labels as labels
from wnjax._transforms.inspect import norms as norms
from wnjax._transforms.inspect import summary as summary
from wnjax._transforms.report import Initialized as Initialized
from wnjax._transforms.weight_norm import fold as fold
from wnjax._transforms.weight_norm import weight_norm as weight_norm
from wnjax._transforms.wrap import wrap as wrap

__version__ = "0.1.0"
