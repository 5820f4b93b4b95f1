"""When a ternary weight is quantised: strategies with one result.

`unattached` holds until an optimizer is attached and chooses one of the `strategies` then.

Quantising is not idempotent, so it may happen only after a *real* rewrite of the latents: not after
a skipped step, not when a gather repeats, not on a bucket whose gather is in flight. The state is a
flag per weight (`TernarySite.fresh`), cleared by all that brings latents back or lets them be
edited: a successful `optimizer.step`, a load, and `latents`. Of Megatron only the outermost
`optimizer.step` and `reload_model_params` are wrapped, on the instance; everything else hangs on
the linear's own forward, which runs after all of Megatron's hooks.
"""
