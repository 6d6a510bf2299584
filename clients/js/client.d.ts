/** The types of client.js. README.md says what each option does. */

/** A published notification, a test notification or a system message. */
export interface Notification {
  id: string;
  type: string;
  timestamp: string;
  data: { message: string; [name: string]: unknown };
  topics?: string[];
  sender: string;
}

/** Any other message of the protocol: `welcome`, `resume`, `subscribed`, `error` and others. */
export interface Message {
  type: string;
  [name: string]: any;
}

/** A key or token, or a function that gives one for each connection and before the old one expires. */
export type Token = string | (() => string | Promise<string>);

/** The detail of each state. */
export interface States {
  connecting: Record<string, never>;
  open: { clientId: string; user?: string };
  /** `delay` is in milliseconds. */
  waiting: { code: number; reason: string; delay: number };
  closed: { code: number; reason: string };
}

export type State = keyof States;

export interface ClientOptions {
  clientId?: string;
  user?: string;
  topics?: string | Iterable<string>;
  since?: string;
  token?: Token;
  ack?: boolean;
  shared?: boolean;
  onNotification?(notification: Notification): unknown;
  onMessage?(message: Message): unknown;
  onState?<Name extends State>(state: Name, detail: States[Name]): void;
  onError?(error: unknown): void;
  WebSocket?: new (url: string, protocols?: string[]) => any;
}

export class NotifydClient {
  constructor(url: string | URL, options?: ClientOptions);
  last: string;
  state: State;
  readonly topics: string[];
  subscribe(...topics: (string | string[])[]): Promise<void>;
  unsubscribe(...topics: (string | string[])[]): Promise<void>;
  authenticate(token: string): Promise<void>;
  close(): void;
}

export class NotifydError extends Error {
  /** The status of an HTTP answer; none for an error on a WebSocket. */
  status?: number;
  id?: string;
  category?: "validation" | "connection" | "application" | "system";
}

export interface PublishOptions {
  type?: string;
  data?: Record<string, unknown>;
  clients?: string[];
  topics?: string[];
  users?: string[];
  key?: string;
}

export interface Published {
  status: "success";
  message: string;
  recipients: number;
  notification: Record<string, unknown>;
  timestamp: string;
}

export class Notifyd {
  constructor(url: string | URL, options?: { token?: string; attempts?: number; fetch?: typeof fetch });
  notify(message: string, options?: PublishOptions): Promise<Published>;
  health(): Promise<Record<string, any>>;
  metrics(): Promise<Record<string, any>>;
  status(): Promise<Record<string, any>>;
}

/** Return the milliseconds to wait after so many failures. */
export function backoff(failures: number, base?: number, cap?: number): number;

/** Return the milliseconds that the value of a `Retry-After` asks to wait. */
export function retryAfter(given: string | null): number;
