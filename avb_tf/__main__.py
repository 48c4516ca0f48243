"""`python -m avb_tf` is the command line."""

from avb_tf.command_line import main

if __name__ == "__main__":
    main()
