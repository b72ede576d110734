// A client that validates each request and each answer with zod, as the OpenAPI document says. Some answers are as long as
// they can be.
import { completeTask, createTask, deleteTask, getTask, listDeletions, listTasks, updateTask } from "./generated/index.js";
import { client } from "./generated/client.gen.js";

declare const process: { env: Record<string, string> };

const { URL, USER, TOKEN } = process.env as Record<"URL" | "USER" | "TOKEN", string>;
client.setConfig({ baseUrl: URL, auth: () => TOKEN, throwOnError: true });

const headers = { Authorization: `Bearer ${TOKEN}`, "Content-Type": "application/json" };
const longest = { title: "🦀".repeat(500), description: "🦀".repeat(10_000), tags: ["🦀".repeat(50)] };
const body = JSON.stringify({ ...longest, due_at: "0001-01-01T00:00:00+00:00" });
const created = await fetch(`${URL}/api/${USER}/tasks`, { method: "POST", headers, body });

const user = { user_id: USER };
const path = { ...user, id: (await created.json()).id as number };
const { data: read } = await getTask({ path, throwOnError: true });
const short = { title: "t", description: null, tags: [], priority: "high" as const };
const { data: changed } = await updateTask({ path, body: { ...read, ...short }, throwOnError: true });
await completeTask({ path });
const { data: done } = await completeTask({ path, body: { is_completed: true }, throwOnError: true });
await createTask({ path: user, body: [{ title: "a" }, { title: "b" }] });
const { data: tasks } = await listTasks({ path: user, query: { sort: "-due_at", priority: ["high"] }, throwOnError: true });
await deleteTask({ path });
const { data: deletions } = await listDeletions({ path: user, query: { since: changed.created_at }, throwOnError: true });
const { error } = await getTask({ path, throwOnError: false });

console.log(
  JSON.stringify({
    read: read.title === longest.title,
    done: done.is_completed,
    listed: tasks.map((task) => task.priority),
    deleted: deletions.length,
    gone: error?.detail,
  }),
);
