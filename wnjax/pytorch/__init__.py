"""PyTorch's state dicts in and out, with weight norm in both of its key styles.

PyTorch itself is not needed.
"""

from wnjax.pytorch._from_state_dict import from_state_dict as from_state_dict
from wnjax.pytorch._infer_layouts import infer_layouts as infer_layouts
from wnjax.pytorch._layouts import Layout as Layout
from wnjax.pytorch._layouts import Layouts as Layouts
from wnjax.pytorch._names import Names as Names
from wnjax.pytorch._names import Part as Part
from wnjax.pytorch._names import lstm as lstm
from wnjax.pytorch._to_state_dict import to_state_dict as to_state_dict
