"""The whole training step in one plan: forward, backward and the optimizer's update (``memplan.compile_step``).

``update`` knows the arithmetic of torch.optim; ``capture`` appends it to the joint graph; ``compile`` is what a user calls.
"""

from memplan.step.compile import Step, compile_step

__all__ = ["Step", "compile_step"]
