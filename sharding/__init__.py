"""Spreading arrays over a mesh by the names of their axes. Knows jax and `pallas_kernels` only.

Arrays carry logical axes (`mmx.nn.layers.ParamSpec.axes`), `Rules` say which axes of a mesh split
them, and a `Partition` is mesh and rules together. `experts` brings tokens to their experts;
`lasp` and `ring` are the two kinds of attention over sequences that are split over devices.
"""

from sharding import experts as experts
from sharding import lasp as lasp
from sharding import ring as ring
from sharding import rules as rules
from sharding.mesh import MeshConfig as MeshConfig
from sharding.mesh import axis_sizes as axis_sizes
from sharding.mesh import make_mesh as make_mesh
from sharding.partition import Partition as Partition
from sharding.partition import constrain as constrain
from sharding.partition import named as named
