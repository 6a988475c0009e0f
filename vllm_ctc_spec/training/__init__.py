"""Training a drafter: rows of text -> frozen target's hidden states -> alignment-sum loss -> drafter folder."""
