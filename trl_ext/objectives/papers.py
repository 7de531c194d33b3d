"""Papers that entries of the tables come from, for model cards, in the form of `_paper` of TRL's trainers."""

import textwrap


MAXRL = {
    "title": "Maximum Likelihood Reinforcement Learning",
    "id": "2602.02710",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{tajwar2026maxrl,
            title        = {{Maximum Likelihood Reinforcement Learning}},
            author       = {Fahim Tajwar and Guanning Zeng and others},
            year         = 2026,
            eprint       = {arXiv:2602.02710},
        }"""),
}
DPPO = {
    "title": "Rethinking the Trust Region in LLM Reinforcement Learning",
    "id": "2602.04879",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{qi2026rethinking,
            title        = {{Rethinking the Trust Region in LLM Reinforcement Learning}},
            author       = {Penghui Qi and Xiangxin Zhou and Zichen Liu and others},
            year         = 2026,
            eprint       = {arXiv:2602.04879},
        }"""),
}
