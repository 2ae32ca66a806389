"""A site's local work: train, evaluate, and send what may leave the site."""
