"""Several teams on one running API: an administrator, and for each project a client with a key of its own."""

from __future__ import annotations

from openai import AsyncOpenAI

from tests.api.running import Running


class House:
    """A running API and the clients that tests make for its keys."""

    def __init__(self, api: Running) -> None:
        self.api = api
        self.clients: list[AsyncOpenAI] = []

    def client(self, key: str) -> AsyncOpenAI:
        url = f"{self.api.services.settings.url}/v1"
        made = AsyncOpenAI(base_url=url, api_key=key, admin_api_key=key, timeout=60, max_retries=0)
        self.clients.append(made)
        return made

    async def administrator(self) -> AsyncOpenAI:
        """The first key, which anybody at this machine can make."""
        path = "/v1/organization/projects/default/service_accounts"
        made = (await self.api.http.post(path, json={"name": "admin", "scope": "admin"})).json()
        return self.client(made["api_key"]["value"])

    async def team(self, admin: AsyncOpenAI, name: str) -> tuple[str, AsyncOpenAI]:
        project = await admin.admin.organization.projects.create(name=name)
        account = await admin.admin.organization.projects.service_accounts.create(project.id, name=f"{name} bot")
        assert account.api_key is not None
        return project.id, self.client(account.api_key.value)

    async def close(self) -> None:
        for one in self.clients:
            await one.close()
