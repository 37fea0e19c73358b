"""Models from scratch, trained and compared, the reversal curse included:
``python scripts/experiment.py --models pythia infini multi_memory hierarchical --samples N --epochs N --lr X``.

Without options: all models, as config/experiment.yaml says under ``transformer_lm``, where everything else stands, too.
"""

from senri.cli.experiment import main

if __name__ == "__main__":
    main()
