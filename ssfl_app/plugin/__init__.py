"""The plug-in layer: SSFL for people who have a Flower project already.

=================  ==========================================================================================
module             what
=================  ==========================================================================================
`strategy`         `SSFL`, the server side: takes FedAvg's arguments and starts like FedAvg
`topk`             `TopK`, top-k in the place of FedAvg
`mod`              `sparse_mod` and `sparse_numpy_mod`, the client side: masked values <-> the dense arrays of an
                   unmodified train function
`gradients`        `mask_gradients`, one optional line in a foreign training loop
`state_spec`       what both ends know of a foreign state dict: names, shapes, types, order, what is pruned
`gradient_probe`   how the mod reads saliency out of somebody else's train function
`model_inspector`  which of an optimizer's parameters is which tensor of the model
`tensor_report`    what a client tells of the model: which tensors are one, and which are no weights
`ranking`          from mean scores to the mask
`legacy`           Message API <-> what an old-style NumPyClient takes
`secure`           the client side of sums: a node's keys, and what it answers where the server only adds
`node_sum`         the server side of sums: `SSFL(secure_aggregation=True)`, and values "fixed32" in the clear
`messenger`        the server's messages to nodes, resent with the mask to a node that lost it
`checked_reply`    one checked answer of a node
`metrics`          which metrics all replies of a round have
`inner`            what another Flower strategy makes of the replies of a round
`rounds`           the round loop, and the record of each round
`discovery`        round 0: the question for saliency, and the mask
`cohort`           who takes part
=================  ==========================================================================================

Names are exported by `ssfl_app` itself; `docs/plugin.md` says how they are used.
"""
