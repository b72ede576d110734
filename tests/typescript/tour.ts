// The README's tour, by a client that knows the API from its OpenAPI document alone: what does not fit does not compile.
import createClient from "openapi-fetch";
import type { components, paths } from "./schema";

type Task = components["schemas"]["Task"];

declare const process: { env: Record<string, string> };

const { URL, USER, TOKEN } = process.env as Record<"URL" | "USER" | "TOKEN", string>;
const client = createClient<paths>({ baseUrl: URL, headers: { Authorization: `Bearer ${TOKEN}` } });
const person = { user_id: USER };

function good<T>(answer: { data?: T; error?: unknown }): T {
  if (answer.data === undefined) throw new Error(JSON.stringify(answer.error));
  return answer.data;
}

function one(tasks: Task | Task[]): Task {
  if (Array.isArray(tasks)) throw new Error("an array, for one");
  return tasks;
}

const created = one(
  good(await client.POST("/api/{user_id}/tasks", { params: { path: person }, body: { title: "Call Ann" } })),
);
const path = { ...person, id: created.id };
good(
  await client.POST("/api/{user_id}/tasks", {
    params: { path: person, header: { "Idempotency-Key": "k1" } },
    body: [{ title: "Paint" }, { title: "Sail", tags: ["boat"], priority: "high" }],
  }),
);
const changed = good(
  await client.PUT("/api/{user_id}/tasks/{id}", { params: { path }, body: { ...created, description: "about the boat" } }),
);
good(await client.PATCH("/api/{user_id}/tasks/{id}/complete", { params: { path } }));
const done = await client.PATCH("/api/{user_id}/tasks/{id}/complete", { params: { path }, body: { is_completed: true } });
const completed: Task = good(done);
const again = await client.GET("/api/{user_id}/tasks/{id}", { params: { path } });
const chosen: Task[] = good(
  await client.GET("/api/{user_id}/tasks", {
    params: { path: person, query: { tag: ["boat"], priority: ["high", "low"], is_completed: false, sort: "-due_at", limit: 5 } },
  }),
);
const stale = await client.DELETE("/api/{user_id}/tasks/{id}", { params: { path, header: { "If-Match": '"old"' } } });
const deleted: Task = good(await client.DELETE("/api/{user_id}/tasks/{id}", { params: { path } }));
const rest: Task[] = good(
  await client.DELETE("/api/{user_id}/tasks", { params: { path: person, query: { is_completed: false } } }),
);
const since = good(
  await client.GET("/api/{user_id}/deletions", { params: { path: person, query: { since: created.created_at } } }),
);

console.log(
  JSON.stringify({
    changed: changed.description,
    completed: completed.is_completed,
    same: again.response.headers.get("ETag") === done.response.headers.get("ETag"),
    chosen: chosen.map((task) => task.title),
    stale: stale.error?.detail,
    deleted: deleted.id === created.id,
    gone: since.map((deletion) => [deleted, ...rest].some((task) => task.id === deletion.id)),
    rest: rest.map((task) => task.title),
  }),
);
