"""What `AVB.fit` runs on: Keras's methods, graphs of many steps, optimizers, schedules."""
