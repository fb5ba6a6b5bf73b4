"""`kvshare bench`: measures on live engines what a hit saves."""
