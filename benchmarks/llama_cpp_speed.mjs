// llama.cpp's decoding on demand, for llama_cpp_speed.py.
//
// Arguments: a GGUF file, a JSON file with the token ids of prompts, the number of threads. Answers
// each line of standard input, {"sequences", "tokens"} as JSON, with one of {"seconds", "answers"}:
// the first so many prompts are answered greedily in one context, a token of each in a batch, and
// the seconds are those from the first token of all to the last one. It sleeps between the lines.
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { loadModel } from "./llama_cpp_model.mjs";

const [modelPath, promptsPath, threads] = process.argv.slice(2);
const prompts = JSON.parse(readFileSync(promptsPath, "utf8"));
const model = await loadModel(modelPath, Number(threads));
const CONTEXT = 1024; // tokens of a sequence

// A context for each number of sequences, so that a single user's is not made for several.
const contexts = new Map();
async function sequencesOf(number) {
  if (!contexts.has(number)) {
    const context = await model.createContext({
      contextSize: CONTEXT,
      sequences: number,
      threads: Number(threads),
    });
    contexts.set(number, Array.from({ length: number }, () => context.getSequence()));
  }
  return contexts.get(number);
}

async function decode(number, numTokens) {
  const sequences = await sequencesOf(number);
  for (const sequence of sequences) await sequence.clearHistory();
  const answers = sequences.map(() => []);
  const running = sequences.map((sequence, index) =>
    // Ending tokens do not end it: every answer has as many tokens.
    sequence.evaluate(prompts[index], { temperature: 0, yieldEogToken: true }),
  );
  let start = 0;
  for (let step = 0; step < numTokens; step++) {
    // All ask for their next token before any is computed: one batch for all.
    const tokens = await Promise.all(running.map((each) => each.next()));
    tokens.forEach(({ value }, index) => answers[index].push(value));
    if (step === 0) start = performance.now();
  }
  const seconds = (performance.now() - start) / 1000;
  await Promise.all(running.map((each) => each.return()));
  return { seconds, answers };
}

console.log("ready");
for await (const line of createInterface({ input: process.stdin })) {
  const { sequences, tokens } = JSON.parse(line);
  console.log(JSON.stringify(await decode(sequences, tokens)));
}
await llama.dispose();
