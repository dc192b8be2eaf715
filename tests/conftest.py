import jax

# Before any backend exists; tests of sharding need several devices, the others use the first.
jax.config.update("jax_num_cpu_devices", 8)
