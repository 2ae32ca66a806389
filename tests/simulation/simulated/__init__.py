"""A whole federation in one process: the product's pure cores between simulated clocks, networks
and disks."""
