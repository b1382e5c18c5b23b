import { expect, vi } from 'vitest';

globalThis.jest = vi;

// jest shows a thrown error in a snapshot by its message, in quotes.
expect.addSnapshotSerializer({
  test: (value) => value instanceof Error,
  serialize: (value) => `"${value.message}"`,
});
