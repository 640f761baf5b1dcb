"""The methods that MuToR is compared with, one file each; mutor/registry.py names them."""
