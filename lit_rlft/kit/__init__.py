"""Tools that domains build on: data, caches, networks in folders, images, statistics."""
