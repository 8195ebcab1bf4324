"""Tools that prove kernels without a GPU: interpreter guard, recorder of bytes and memory, comparison."""
