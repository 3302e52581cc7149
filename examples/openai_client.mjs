// Two users over HTTP with OpenAI's own client: each is answered in a voice of their own.
//
//     npm install openai
//     cope-lc serve                               (in another terminal)
//     node openai_client.mjs http://127.0.0.1:8000/v1 alice bob

import OpenAI from "openai";

const [baseURL, ...users] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: process.env.COPE_KEY ?? "none" });
const model = (await client.models.list()).data[0].id;
const content = "Write a headline: the village bakery has won a prize for its rye bread.";
for (const user of users) {
  process.stdout.write(`${user}: `);
  const messages = [{ role: "user", content }];
  const pieces = await client.chat.completions.create({
    model, user, messages, max_tokens: 40, stream: true,
  });
  for await (const piece of pieces) process.stdout.write(piece.choices[0].delta.content ?? "");
  console.log();
}
