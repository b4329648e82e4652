"""Experts by modality (MoMa, 2407.21770) against their rivals, every arm scored causally.

    python -m studies.moma --scale cpu --image-tokenizer runs/image_tokenizer/image_tokenizer
    python -m studies.moma --scale real --image-tokenizer FOLDER --captions FILE --image-root FOLDER
    python -m studies.moma --scale cpu --image-tokenizer FOLDER --report-only

Named before anything was run:
  primary    η of 4t4i on the loss over all held-out tokens, causal: how much more compute dense needs for the same
             loss. Of two curves the one that ends lower gives the compute at which it first was where the other ended;
             curves are running minima, interpolated in log compute; the rate is constant after warm-up, so that every
             point of a curve is a run of that length. Geometric mean over paired seeds, 95 % t-interval.
  secondary  the same by direction (text, image, image→text, text→image), on the mean of the four ("balanced", since
             six of seven scored tokens are codes of pictures), and in seconds of the processor; arms beside each other,
             same seeds; the gap between leaky and causal loss, as a row of its own; steps a second beside dense, arms
             in turn.
Arms have the same active weights in training but for `dense_total`, which has as many as 4t4i has in all, and
`mod_4t4i`, whose even number of layers costs some per cent more; η goes by the FLOPs counted. Causal ways to choose may
give a token more or fewer experts than training did: `active when scored`. `4t4i_frozen` is the control, its routers
stay as they were drawn.
The rate is chosen for each arm among the same three, on the val split with a seed of its own, after all steps: after a
third of them high rates look too good. Figures are of the test split. Claims to test: η 3.7 overall, 2.6 text, 5.2
image for 4t4i, 3.0 for 8x; and that agnostic routing is better (2504.07951). All arms norm the input of a block
("pre"): the post-norm would cancel the gate of a lone pick, and a norm of each expert's output makes a token's change
as large as its number of experts; both learn half as fast at these sizes. An arm of its own has MoMa's post-norm. Runs
made by the same recipe are not made again, and several processes share what is left.
"""
