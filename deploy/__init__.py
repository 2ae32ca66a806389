"""How a federation's processes are configured, started, watched and ended."""
