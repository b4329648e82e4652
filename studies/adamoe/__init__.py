"""Null experts (AdaMoE, 2406.13233) against their rivals at equal load: sparse adapters, and a small native MoE.

    python -m studies.adamoe --part a        # adapters on miniworld
    python -m studies.adamoe --part b        # a language model of experts, on English prose
    python -m studies.adamoe --part report   # table, summary, picture and README from what is there

What is compared, named before anything was run:
  primary    mean loss of held-out tokens at equal measured load: an arm's loss minus that of top-2 with picks dropped
             at random, interpolated over measured load seed by seed; the mean over the arms of a family (its three
             loads; one outside the curve is left out), paired over seeds; 95 % t-interval, p by Holm over the families
             of a part.
  secondary  share of answers right to the letter (adapters), of next tokens right (native).
  difficulty Spearman correlation of the number of real experts a token takes with its loss under plain top-2 and with
             its log frequency, layers summed, position removed.
"""
