"""Trains, evaluates and uses models; `python main.py --help` explains how."""

from avb_tf.command_line import main

if __name__ == "__main__":
    main()
