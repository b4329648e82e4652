"""Does drawing routers to the routing of neighbours help (RoMA, 2511.07419), beyond tuning routers at all?

    python -m studies.roma --part native                  # a small mixture of experts, learned here
    python -m studies.roma --part misrouted               # the same with its routers thrown off: a control
    python -m studies.roma --part miniworld --adapter FOLDER --data FOLDER
    python -m studies.roma --part real --base FOLDER --adapter FOLDER --data FOLDER
    python -m studies.roma --part report                  # table and README from what is there

What is compared, named before anything was run:
  claim      true neighbours beat tuning by the answers' loss alone (CE), and random neighbours of the same weights.
  primary    share of test questions right to the letter, on families that alignment never saw (at least three), an
             arm minus its rival seed by seed; 95 % t-interval over seeds, p by Holm over the two rivals.
  secondary  the same on families that it was trained on; mean loss of answers; McNemar's test over all rows of all
             seeds; neighbour consistency (nearest over random) before and after.
Every arm gets four trials of its own settings (rates, λ), two in the LLaVA parts, and keeps the one with the least loss
on validation rows of the trained families. With --tries: what might turn the method positive, explored afterwards and
no part of the claim.
"""
