"""When a ternary weight is quantised: a strategy each, one result.

* `unattached`: before an optimizer is known. It chooses the strategy when one is attached.
* `base`: what strategies share; what a strategy has to say.
* `every_forward`: the forward of each linear quantises.
* `every_step`: model parameters are quantised in place, once after each optimizer step.

Quantising is not idempotent, so it may happen only after a *real* rewrite of the latents: not after
a skipped step, not when a gather repeats, not on a bucket whose gather is in flight. The state is a
flag per weight (`TernarySite.fresh`), cleared by the only three things that bring latents back or
let them be edited: a successful `optimizer.step`, a load, and `latents`. Of Megatron only the
outermost `optimizer.step` and `reload_model_params` are wrapped, on the instance; everything else
hangs on the linear's own forward, which runs after all of Megatron's hooks.
"""
