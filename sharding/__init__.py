"""Spreading arrays over a mesh by the names of their axes. Knows jax and `pallas_kernels` only.

Arrays carry logical axes (`mmx.nn.layers.ParamSpec.axes`), `Rules` say which axes of a mesh split
them, and a `Partition` is mesh and rules together. Most of a model is left to the compiler; what
runs on the shards of each device is `attention` (`lasp` and `ring` where the sequence is split),
`experts` and `vocabulary`. These take global arrays and a partition, or None for one device.
"""

from sharding import attention as attention
from sharding import experts as experts
from sharding import lasp as lasp
from sharding import paged as paged
from sharding import ring as ring
from sharding import rules as rules
from sharding import vocabulary as vocabulary
from sharding.mesh import MeshConfig as MeshConfig
from sharding.mesh import axis_sizes as axis_sizes
from sharding.mesh import make_mesh as make_mesh
from sharding.partition import Partition as Partition
from sharding.partition import constrain as constrain
from sharding.partition import named as named
