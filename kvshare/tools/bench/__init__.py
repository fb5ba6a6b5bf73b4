"""`kvshare bench`: what a hit saves on live engines."""
