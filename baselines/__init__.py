"""The methods that MuToR is compared with, one file each; mutor/registry.py names them."""

if __name__ == "baselines":
    raise ImportError("baselines is mutor.baselines: under another name its classes would be others")
