"""Helpers that several activation kernels share: backend dispatch, CPU cache blocking, GPU tiling, reductions.

Every op has up to three backends and dispatches on its input tensor (`backend.py`):

- *plain*, torch's own differentiable operators, wherever a graph is being recorded (`torch.compile`, `torch.export`,
  tracing, `torch.func`), so that the compiler can fuse the op with its neighbours and the graph does not break;
- *Triton* on CUDA, forward and backward as registered operators (`torch.ops.rtdetr_act`), if Triton is installed;
- *eager* elsewhere: an autograd function that makes few passes over memory, in blocks that fit a CPU's cache.

All backends return the same results and gradients up to rounding. Half-precision inputs are computed in float32 and
rounded once. Second derivatives use the plain form.
"""
