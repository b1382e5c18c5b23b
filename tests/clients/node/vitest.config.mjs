// Runs openai-node's own tests as they stand; they were written for jest, whose interface vitest has under another name.
import { defineConfig } from 'vitest/config';

const source = `${import.meta.dirname}/src`;

export default defineConfig({
  resolve: {
    alias: [
      { find: /^openai$/, replacement: `${source}/index.ts` },
      { find: /^openai\/(.*)$/, replacement: `${source}/$1` },
    ],
  },
  test: {
    globals: true,
    setupFiles: [`${import.meta.dirname}/jest.mjs`],
    fileParallelism: false,
    testTimeout: 120_000,
    cache: false,
  },
});
