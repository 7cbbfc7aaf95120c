"""What the kernels of several activations share: backends, blocks for a CPU's cache, tiles for a GPU, reductions.

Every op has up to three backends and chooses by the tensor it gets (`backend.py`):

- *plain*, torch's own differentiable operators, wherever a graph is being recorded (`torch.compile`, `torch.export`,
  tracing, `torch.func`), so that the compiler fuses the op with its neighbours and no graph breaks;
- *Triton* on CUDA, forward and backward as registered operators (`torch.ops.rtdetr_act`), if Triton is installed;
- *eager* elsewhere: an autograd function of few passes over memory, in blocks that stay in the cache of a CPU.

Results and gradients are the same up to rounding. Half types are computed in float32 and rounded once. A second
derivative is taken through the plain form.
"""
