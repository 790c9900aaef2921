class DataFormat:
    ARROW = 1


class ReadSession:
    def __init__(self, table, data_format):
        self.table, self.data_format = table, data_format
