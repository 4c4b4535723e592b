"""The OpenAI-compatible service: many clients, one model, one thread that computes.

    HTTP ──► guard ──► routes ──► Answer ──► EngineThread ──► BatchEngine
                                    ▲              │
                      streams ◄─────┴── pieces ◄───┘

The event loop reads requests and writes replies; the engine's thread owns the model and knows nothing of HTTP. Between
them there are `Answer`s: what is asked for goes in with `submit` and `cancel`, text comes back piece by piece.
"""
