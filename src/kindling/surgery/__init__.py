"""Surgery: cut, freeze, extend, name and summarise torch modules. Knows torch and no Spark.

A *layer name* is a dotted module path (`features.0`, `block1_conv1`) or, for functions, the node's name in the traced
graph (`cat`, `add_1`); a module that is called again is `shared#2`. A layer's name means its output after its
activation: an activation that is the only reader of a layer's output belongs to that layer, and its own name is another
name for the same point. So are the names of containers (`layer1.0`) for their outputs.

Every function returns new modules and leaves the given one alone; they share the memory of their tensors.

  trace     any module as a graph of named layers                     `surgery.trace`, `surgery.net`
  layers, summary, infer_output_shapes     what it is made of         `surgery.summary`, `surgery.shapes`
  until, then, replace                     other modules made of it   `surgery.cut`
  frozen_layers, set_training, split_frozen, join    freezing         `surgery.freeze`

Modules that cannot be traced run whole, with hooks at the named submodules where they are cut (`surgery.opaque`).
Pictures are drawn in `kindling.picture`; storing a graph is the business of `kindling.graph`.
"""

from kindling.surgery.cut import replace, then, until
from kindling.surgery.freeze import Split, frozen_layers, join, set_training, split_frozen
from kindling.surgery.net import Net
from kindling.surgery.shapes import infer_output_shapes
from kindling.surgery.summary import LayerInfo, Summary, layers, summary
from kindling.surgery.trace import trace

__all__ = [
    "LayerInfo",
    "Net",
    "Split",
    "Summary",
    "frozen_layers",
    "infer_output_shapes",
    "join",
    "layers",
    "replace",
    "set_training",
    "split_frozen",
    "summary",
    "then",
    "trace",
    "until",
]
