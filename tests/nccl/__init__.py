"""torch's own ProcessGroupNCCL on libraries that stand for CUDA, NCCL and cuBLAS: README.md."""
