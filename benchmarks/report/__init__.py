"""The compile report's parts. How to add an op: write `cases_X.py` beside this file with a list `CASES`.

    from report.case import Case

    def forward(device):                                  # makes tensors on the device and calls the launch functions
        x = torch.randn(8192, 320, dtype=torch.float16, device=device)
        return launch_x_forward(x, ...)

    CASES = [Case("x", "SD 1.5, 64x64, fp16, forward", forward, least=..., streams=("x_ptr", "y_ptr"), pinned=True)]

`forward` runs with fake CUDA tensors, so no value may be read (`.item()`, `.tolist()`, boolean indexing): make index
tensors by `torch.arange` and the like, and call what launches, not the custom op around it, which would run its fake.
Every kernel launched on the way is compiled for every target, as it was launched: same tiles, same alignment (a
view's storage offset counts), same integers. A case with `counted=True` also runs in Triton's interpreter on CPU
tensors of the same shapes, with the tiles of a GPU, under the guard that counts bytes: up to some hundred programs.

`python benchmarks/kernel_report.py --op x` prints the op's rows; `--pinned` takes the subset that a test holds.
"""
