"""Runs the command line as `python -m avb_tf`."""

from avb_tf.command_line import main

if __name__ == "__main__":
    main()
