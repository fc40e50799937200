"""What runs kernels: compiler, store, driver. Only here are CUDA bindings imported, and lazily."""
