"""What each step does: a module with a function `run`, which `camera.device_check.plan` lists."""
